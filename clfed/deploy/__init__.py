"""Real nodes: certificates, node keys, invitations, and what is checked before a node connects."""
