"""Options of the command that make a training tiny: 0.4 million parameters from random weights, read in the main process."""

NETWORK = ["--model.backbone", "test_resnet", "--model.weights", "none"]
SMALL_PICTURES = [*NETWORK, "--data.image_size", "32", "--data.workers", "0"]
TINY = ["--model", "finetune.FinetuneModule", *SMALL_PICTURES, "--data.batch_size", "64"]
