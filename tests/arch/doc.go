// Package arch guards the shape of the house: who may import whom, what the
// slim programs carry, and the two TLS settings that would switch
// verification off. Each guard is tried on a small module that breaks it as
// well, so that a guard that sees nothing fails.
package arch
