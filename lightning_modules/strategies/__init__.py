"""What Lightning lacks: strategies, accelerators and precision plugins, named by class path."""
