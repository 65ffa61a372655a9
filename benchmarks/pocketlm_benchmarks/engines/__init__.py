"""The engines that can be measured, each behind the same small interface and in a process of its own."""
