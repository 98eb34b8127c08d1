"""What dnipipe is measured with, and what it was measured against."""
