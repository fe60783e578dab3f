"""Mask R-CNN with a feature pyramid (arXiv 1703.06870, 1612.03144), in static shapes.

What varies from image to image, objects, proposals, positives, fills a fixed number of slots: every step takes every
parameter on every rank and issues the same operations, whatever the images hold, and a plan can count them.
"""
