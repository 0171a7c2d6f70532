"""Job states, store, scheduler, server loop and supervisor. Never imports torch: tensors are opaque frames here."""
