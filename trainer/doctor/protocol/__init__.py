"""Types that the launcher shares with the doctor: findings, folders, link speeds. No torch."""
