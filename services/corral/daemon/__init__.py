"""corrald: which services a process hosts, its settings, its log and its life."""
