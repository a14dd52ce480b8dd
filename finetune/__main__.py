"""The command as `python -m finetune`, which the processes of a training on several devices can start again."""

from finetune.main import main

if __name__ == "__main__":
    main()
