"""Reports on the ranks: tables for the terminal (extra ``[cli]``) and plots (extra ``[plot]``)."""
