"""HAProxy in front of the ingress: its settings, and how it stays on this machine."""
