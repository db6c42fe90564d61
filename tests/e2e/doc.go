// Package e2e tells the whole story with real programs: enrol, push a policy,
// run an action, receive an event; on loopback, behind a firewall that counts,
// and while roles are killed.
package e2e
