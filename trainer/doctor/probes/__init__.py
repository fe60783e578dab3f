"""Probes that collect facts about a host; the checks evaluate them."""
