"""What tests are built of: tiny teachers, datasets, checkpoints and folders, one builder each."""
