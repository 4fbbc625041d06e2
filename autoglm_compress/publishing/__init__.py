"""Model cards, and uploading checkpoints and exports to the Hugging Face hub."""
