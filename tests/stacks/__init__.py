"""What the tests of all serving stacks share."""
