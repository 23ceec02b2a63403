"""What a spectrum says about generalization: criteria, type, and the verdict on several of them."""
