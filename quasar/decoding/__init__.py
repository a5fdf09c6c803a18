"""The decode loop and what it is made of: drafts, acceptance, sampling, stop criteria."""
