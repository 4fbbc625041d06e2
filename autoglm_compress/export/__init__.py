"""Files for engines other than `transformers`, which hold a checkpoint's integers as they are and are proven right."""
