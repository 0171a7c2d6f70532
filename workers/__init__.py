"""The worker loop and the three stages. Knows no other jobs, no scheduling and no clients."""
