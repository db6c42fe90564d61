package pki

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"sallyport/internal/lockdir"
	"sallyport/internal/wire"
)

// gatewayGrace is how long after the end of its last leaf a gateway may come
// back with its key alone. After that it needs a new code.
const gatewayGrace = 90 * 24 * time.Hour

// codeKept is how long a code that expired is kept: until then whoever comes
// with it hears when it expired.
const codeKept = 24 * time.Hour

// Gateways is the register of the gateways that an authority works for, and of
// the codes that are open: small files below the authority's directory, so that
// the operator of that host works on them without asking any process. Whoever
// may write there holds the CA.
type Gateways struct {
	dir string
	mu  sync.Mutex // one code, one gateway
}

// OpenGateways is the register below the directory of an authority. It reads
// nothing.
func OpenGateways(dir string) *Gateways { return &Gateways{dir: dir} }

// codeRecord is an open code; its token is known by its hash only.
type codeRecord struct {
	TokenID string    `json:"token_id"`
	Hash    string    `json:"hash"` // SHA-256 in hex
	Expires time.Time `json:"expires"`
}

func (g *Gateways) codePath(tokenID string) string {
	return filepath.Join(g.dir, "gateways", "code-"+tokenID+".json")
}

func (g *Gateways) gatewayPath(key wire.KeyHash) string {
	return filepath.Join(g.dir, "gateways", "gateway-"+string(key)+".json")
}

func validTokenID(s string) bool {
	b, err := hex.DecodeString(s)
	return err == nil && len(b) == 8 && s == strings.ToLower(s)
}

// Add makes a code for one gateway of the authority in the directory.
func (g *Gateways) Add(ttl time.Duration) (GatewayCode, time.Time, error) {
	fail := func(err error) (GatewayCode, time.Time, error) {
		return GatewayCode{}, time.Time{}, fmt.Errorf("make a gateway code: %w", err)
	}
	td, err := os.ReadFile(filepath.Join(g.dir, fileTrustDomain))
	if errors.Is(err, fs.ErrNotExist) {
		return fail(fmt.Errorf("there is no authority in %s: start the authority first, with the same SALLYPORT_DATA", g.dir))
	}
	if err != nil {
		return fail(err)
	}
	root, err := readCert(g.dir, fileRoot)
	if err != nil {
		return fail(err)
	}
	if err := g.tidy(); err != nil {
		return fail(err)
	}
	var random [8 + 32]byte
	if _, err := rand.Read(random[:]); err != nil {
		return fail(err)
	}
	c := GatewayCode{
		TrustDomain: strings.TrimSpace(string(td)), Root: root.Raw,
		TokenID: hex.EncodeToString(random[:8]), Token: base64.RawURLEncoding.EncodeToString(random[8:]),
	}
	rec := codeRecord{TokenID: c.TokenID, Hash: hashToken(c.Token), Expires: time.Now().Add(ttl).UTC()}
	if err := g.put(g.codePath(c.TokenID), rec); err != nil {
		return fail(err)
	}
	return c, rec.Expires, nil
}

// tidy removes the codes that expired a while ago: nobody else would. A file
// that is no record is left for a person to look at.
func (g *Gateways) tidy() error {
	dir := filepath.Join(g.dir, "gateways")
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		var rec codeRecord
		path := filepath.Join(dir, e.Name())
		if !strings.HasPrefix(e.Name(), "code-") || get(path, &rec) != nil || time.Since(rec.Expires) < codeKept {
			continue
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

func hashToken(token string) string {
	sum := sha256.Sum256([]byte(token))
	return hex.EncodeToString(sum[:])
}

// register makes a key that of a gateway, once per code. The same key may
// repeat it.
func (g *Gateways) register(key wire.KeyHash, r registerRequest) (Gateway, error) {
	refused := func(format string, args ...any) (Gateway, error) {
		return Gateway{}, fmt.Errorf("%w: gateway code: "+format, append([]any{ErrRefused}, args...)...)
	}
	if _, err := wire.ParseID(string(r.ID)); err != nil {
		return refused("%v", err)
	}
	if !validTokenID(r.TokenID) {
		return refused("it is malformed")
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	var rec codeRecord
	err := get(g.codePath(r.TokenID), &rec)
	if errors.Is(err, fs.ErrNotExist) {
		if gw, err := g.byKey(key); err == nil && gw.TokenID == r.TokenID && gw.ID == r.ID && gw.Removed.IsZero() && !gw.lapsed() {
			return gw, nil // the answer was lost
		}
		return refused("it is unknown, or was used already")
	}
	if err != nil {
		return Gateway{}, err
	}
	if subtle.ConstantTimeCompare([]byte(rec.Hash), []byte(hashToken(r.Token))) != 1 {
		return refused("it is unknown, or was used already")
	}
	if time.Now().After(rec.Expires) {
		return refused("it expired at %s; make another with `sallyport ca gateway add`", rec.Expires.Format(time.RFC3339))
	}
	all, err := g.List()
	if err != nil {
		return Gateway{}, err
	}
	for _, other := range all {
		switch {
		case other.Key == key && !other.Removed.IsZero():
			return refused("this gateway was removed and its key is revoked; delete its identity directory, so that it makes another")
		case other.ID == r.ID && other.Key != key && other.Removed.IsZero():
			return refused("%s is another gateway's UUID (key %s); remove that one first", r.ID, other.Key.Fingerprint())
		case other.TokenID == r.TokenID && other.Key != key:
			return refused("it is unknown, or was used already")
		}
	}
	gw := Gateway{ID: r.ID, Key: key, TokenID: r.TokenID, Added: time.Now().UTC()}
	if old, err := g.byKey(key); err == nil {
		gw.Until = old.Until
	}
	// The gateway is written before the code goes: a crash between them leaves
	// a code that serves the same key only.
	if err := g.put(g.gatewayPath(key), gw); err != nil {
		return Gateway{}, err
	}
	return gw, os.Remove(g.codePath(r.TokenID))
}

// admit is the gateway with a key, if it may ask for anything.
func (g *Gateways) admit(key wire.KeyHash) (Gateway, error) {
	gw, err := g.byKey(key)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return gw, fmt.Errorf("%w: key %s", ErrUnregistered, key.Fingerprint())
	case err != nil:
		return gw, err
	case !gw.Removed.IsZero():
		return gw, fmt.Errorf("%w: it was removed at %s", ErrUnregistered, gw.Removed.Format(time.RFC3339))
	case gw.lapsed():
		return gw, fmt.Errorf("%w any more: its last certificate ended at %s, and it needs a new code", ErrUnregistered, gw.Until.Format(time.RFC3339))
	}
	return gw, nil
}

// lapsed tells whether a gateway was away for too long to come back by its key
// alone. One that has had a new code since may have its next certificate.
func (gw *Gateway) lapsed() bool {
	return !gw.Until.IsZero() && time.Since(gw.Until) > gatewayGrace && time.Since(gw.Added) > gatewayGrace
}

// issued notes until when a gateway's leaf is good.
func (g *Gateways) issued(key wire.KeyHash, until time.Time) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	gw, err := g.byKey(key)
	if err != nil {
		return err
	}
	gw.Until = until.UTC()
	return g.put(g.gatewayPath(key), gw)
}

func (g *Gateways) byKey(key wire.KeyHash) (gw Gateway, err error) {
	if _, err := wire.ParseKeyHash(string(key)); err != nil {
		return gw, err
	}
	return gw, get(g.gatewayPath(key), &gw)
}

// List is every gateway, those that were removed too, newest first.
func (g *Gateways) List() ([]Gateway, error) {
	entries, err := os.ReadDir(filepath.Join(g.dir, "gateways"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var all []Gateway
	for _, e := range entries {
		name, ok := strings.CutPrefix(e.Name(), "gateway-")
		if !ok || !strings.HasSuffix(name, ".json") {
			continue
		}
		var gw Gateway
		if err := get(filepath.Join(g.dir, "gateways", e.Name()), &gw); err != nil {
			return nil, err
		}
		all = append(all, gw)
	}
	slices.SortFunc(all, func(a, b Gateway) int { return b.Added.Compare(a.Added) })
	return all, nil
}

// ErrNoGateway says that no gateway has a UUID.
var ErrNoGateway = errors.New("no such gateway")

// Remove ends the trust in a gateway: the authority answers it no more, and
// revokes its key. Others hear of it from the gateways that remain.
func (g *Gateways) Remove(id wire.ID) (Gateway, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	all, err := g.List()
	if err != nil {
		return Gateway{}, err
	}
	for _, gw := range all {
		if gw.ID == id && gw.Removed.IsZero() {
			gw.Removed = time.Now().UTC()
			return gw, g.put(g.gatewayPath(gw.Key), gw)
		}
	}
	return Gateway{}, fmt.Errorf("%w: %s", ErrNoGateway, id)
}

// put writes a record so that the owner of the authority's directory can read
// it, also when root works there.
func (g *Gateways) put(path string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	dir := filepath.Dir(path)
	if err := lockdir.Make(dir, 0o700); err != nil {
		return err
	}
	return writeFile(dir, filepath.Base(path), b, 0o600)
}

func get(path string, v any) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}
