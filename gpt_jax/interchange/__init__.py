"""Trained models, as a user holds them and as folders to share."""
