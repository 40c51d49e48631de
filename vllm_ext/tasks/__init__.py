"""What models are asked: texts, passages cut from them, tasks, and how answers score."""
