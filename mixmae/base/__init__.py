"""What every package uses: errors, exit codes, files, ports, a rank's environment. Standard library only."""
