"""Token ids in, token ids out; text lives above. One thread owns the device and all state in here."""
