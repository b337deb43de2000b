"""From the bytes of a member to pixels and captions, under limits that hold before memory is taken."""
