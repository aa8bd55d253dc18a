"""Where jobs run; knows no science."""
