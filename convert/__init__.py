"""Converting checkpoints between Hugging Face safetensors and Orbax: `python -m convert --help`."""
