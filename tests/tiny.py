"""Options of the command that make a training tiny: 0.4 million parameters from random weights, read in the main process."""

NETWORK = ["--model.backbone", "test_resnet", "--model.weights", "none"]
TINY = ["--model", "finetune.FinetuneModule", *NETWORK, "--data.workers", "0", "--data.batch_size", "64"]
SMALL_PICTURES = [*NETWORK, "--data.image_size", "32", "--data.workers", "0"]
