"""Run the command from a checkout without installing it: `python cli.py fit --config recipes/small.yaml`."""

from finetune.main import main

if __name__ == "__main__":
    main()
