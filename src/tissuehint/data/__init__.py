"""What goes in: images, hints, patches."""
