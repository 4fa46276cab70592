"""What happens to media and prompts before the model: limits, pictures, clips, views, prompt templates."""
