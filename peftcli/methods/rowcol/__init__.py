"""Row and column space: adapters inside them, models cut down to them, one matrix used through both."""
