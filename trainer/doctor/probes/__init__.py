"""Gathering facts about a host; nothing is judged here."""
