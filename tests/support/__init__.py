"""What tests share: servers, factories, and ways to move time."""
