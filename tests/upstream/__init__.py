"""The common model tests of transformers and PEFT, run on hosts that carry Vision Remember."""
