package enroll

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"sallyport/internal/atomicfile"
	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

// fileImported holds the verdict of a certificate that came by file, until the
// role takes over what it says beside the certificate.
const fileImported = "imported.json"

// Offer is what a party says of itself in a request by file.
type Offer struct {
	Name    string
	Tags    map[string]string
	Program string
	// TokenID names a join code that has no token: an operator's word on name
	// and tags. A token never stands in a file that somebody carries.
	TokenID string
}

// Offline makes the request of a party whose root is pinned, for a file.
func Offline(id *identity.Identity, o Offer) (wire.Envelope, error) {
	root, td := id.Pinned()
	if root == "" {
		return wire.Envelope{}, identity.ErrNotPinned
	}
	csr, err := id.CSR(false)
	if err != nil {
		return wire.Envelope{}, err
	}
	return id.SealRequest(wire.OfflineRequest{TrustDomain: td, Root: root, Request: wire.EnrollRequest{
		Role: id.Role(), ID: id.ID(), Name: o.Name, Tags: maps.Clone(o.Tags), CSR: csr, TokenID: o.TokenID,
		Program: o.Program, Versions: wire.OwnVersions, Time: time.Now().UTC(),
	}})
}

// Import installs the answer to such a request into the identity of a role
// that does not run. The role keeps the rest of it at its next start: see
// [Applicant.TakeImported].
func Import(id *identity.Identity, env wire.Envelope) (wire.OfflineAnswer, error) {
	a, err := id.OpenAnswer(env)
	if err != nil {
		return a, err
	}
	verdict := a.Verdict
	verdict.Chain, verdict.Trust, verdict.Revocations = nil, nil, nil
	b, err := json.Marshal(verdict)
	if err != nil {
		return a, err
	}
	// All that is asked for later is there before the certificate counts.
	if err := atomicfile.Write(filepath.Join(id.Dir(), fileImported), b, 0o600); err != nil {
		return a, fmt.Errorf("keep the answer: %w", err)
	}
	if err := rememberAddresses(id.Dir(), verdict.RCPs); err != nil {
		return a, err
	}
	if err := id.Install(a.Verdict.Chain); err != nil {
		return a, err
	}
	if t := a.Verdict.Trust; t != nil {
		if _, err := id.ApplyTrust(*t); err != nil && !errors.Is(err, identity.ErrOlder) {
			return a, fmt.Errorf("the certificate is installed, its trust document is not: %w", err)
		}
	}
	if r := a.Verdict.Revocations; r != nil {
		if _, err := id.ApplyRevocations(*r); err != nil && !errors.Is(err, identity.ErrOlder) {
			return a, fmt.Errorf("the certificate is installed, the revocation set is not: %w", err)
		}
	}
	if id.Revoked(id.KeyHash()) {
		return a, fmt.Errorf("%w since the answer's revocation set: a new join code makes this %s use a new key", identity.ErrRevoked, id.Role())
	}
	return a, nil
}

// rememberAddresses puts the way in where those of a join code are kept: a list
// that the gateway sends is given up when none of it answers for some minutes,
// and this party may start days before its network is there.
func rememberAddresses(dir string, rcps []wire.RCPAddresses) error {
	var addrs []string
	for _, r := range rcps {
		addrs = append(addrs, r.Addresses...)
	}
	if len(addrs) == 0 {
		return nil
	}
	slices.Sort(addrs)
	var m joinMemory
	b, err := os.ReadFile(filepath.Join(dir, fileJoin))
	if err == nil {
		err = json.Unmarshal(b, &m)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		m = joinMemory{} // damaged: it costs a superfluous attempt
	}
	m.Addresses = slices.Compact(addrs)
	if err := m.write(dir); err != nil {
		return fmt.Errorf("keep the addresses: %w", err)
	}
	return nil
}

// comeByFile remembers the join code that is there as used, as if the party had
// come by it: it is no other that asks for another key when an upstream refuses
// this one.
func (a *Applicant) comeByFile() error {
	if err := a.loadMemory(); err != nil {
		return err
	}
	joins, err := a.cfg.Join.Codes()
	if err != nil { // Run says so
		a.cfg.Log.Debug("join codes beside an imported certificate", "error", err)
	}
	joins, _ = a.ours(joins)
	a.mu.Lock()
	defer a.mu.Unlock()
	_, id := a.pick(joins)
	if id == "" {
		return nil
	}
	m := a.memory
	m.Used = id
	return a.remember(m)
}

// TakeImported hands OnGrant what came with a certificate by file. The role
// calls it once, before Run.
func (a *Applicant) TakeImported() error {
	if _, enrolled := a.id.Party(); !enrolled || a.id.Dir() == "" {
		return nil
	}
	file := filepath.Join(a.id.Dir(), fileImported)
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("imported certificate: %w", err)
	}
	var v wire.EnrollVerdict
	if err := json.Unmarshal(b, &v); err != nil {
		return fmt.Errorf("imported certificate: %s is damaged: %w (delete it to go on without: the gateway says the same again)", file, err)
	}
	v.RCPs = nil // they are remembered with the addresses of join codes
	if a.cfg.OnGrant != nil {
		if err := a.cfg.OnGrant(v); err != nil {
			return fmt.Errorf("imported certificate: %w", err)
		}
	}
	if err := a.comeByFile(); err != nil {
		return err
	}
	a.cfg.Log.Info("enrolled by file", "id", a.id.ID(), "name", wire.Quotable(v.Name), "trust_domain", a.id.TrustDomain(), "not_after", a.id.NotAfter())
	if err := os.Remove(file); err != nil {
		return fmt.Errorf("imported certificate: %w", err)
	}
	return nil
}
