"""The protocol between Triptych's processes, and the client. Knows no torch, no models, no scheduling."""
