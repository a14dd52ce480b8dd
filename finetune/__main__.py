"""The command as `python -m finetune`, which the processes of a training on several devices can start again.

The working folder was taken off `sys.path` when the package was imported.
"""

from finetune.main import main

if __name__ == "__main__":
    main()
