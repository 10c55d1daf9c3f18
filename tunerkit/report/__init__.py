"""What became of the ranks: in the terminal (extra ``[cli]``), and as pictures (extra ``[plot]``)."""
