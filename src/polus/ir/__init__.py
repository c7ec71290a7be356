"""Dense retrieval: training, scores, losses, models, stored representations and evaluation."""
