//go:build !race

package main

// raceEnabled: the race detector makes the processes several times slower,
// and the contract's times are for ordinary builds.
const raceEnabled = false
