"""Training scripts: the paper's two phases in a loop of PyTorch, in transformers' Trainer and in TRL's SFTTrainer."""
