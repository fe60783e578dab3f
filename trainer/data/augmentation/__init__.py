"""Augmentation of labelled images in uint8, crops decoded as in pretraining."""
