"""What engines on serving stacks share."""
