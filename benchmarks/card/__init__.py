"""Getting ready for a rented GPU: a smoke test to run there, and a rehearsal to run before."""
