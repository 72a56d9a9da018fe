"""White-box tests that try to remove a checkpoint's refusal."""
