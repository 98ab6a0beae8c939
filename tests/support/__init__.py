"""What tests share: daemons, leftovers, hostile pictures, the modes in which an engine runs."""
