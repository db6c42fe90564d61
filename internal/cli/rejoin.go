package cli

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"sallyport/internal/atomicfile"
	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

// setAside is the name of the directory that an identity goes to; the time
// follows.
const setAside = "identity-set-aside-"

func (l *localRole) rejoinCommand() *cobra.Command {
	o := &offline{localRole: l}
	var yes bool
	cmd := &cobra.Command{
		Use: "rejoin [--trust-domain NAME] [--yes]", Short: "Set this host's identity aside, so that it enrols anew", Args: Exactly(0),
		Long: "Set the identity of the node or RCP on this host aside: key, certificate, UUID, trust, and which installation it\n" +
			"obeys. Started with a new join code it enrols as a new party. That is for a gateway whose database was lost without\n" +
			"a backup, for a certificate that expired longer ago than the grace, for corrupt files, and for another gateway.\n" +
			"Policies, files and events that were not sent stay. Nothing is deleted: the old identity is moved to a directory\n" +
			"beside it, which holds a private key. The role must not run.",
		RunE: func(_ *cobra.Command, _ []string) error { return o.rejoin(yes) },
	}
	f := cmd.Flags()
	f.StringVar(&o.trustDomain, "trust-domain", "", "which gateway's identity, of a node that serves several: local instance list shows them")
	f.BoolVar(&yes, "yes", false, "do not ask")
	return cmd
}

// rejoin is `local rejoin`. It opens nothing: the files may be corrupt.
func (o *offline) rejoin(yes bool) (err error) {
	role, err := o.role("")
	if err != nil {
		return err
	}
	dir, release, err := o.lock(role, false)
	if errors.Is(err, errNoDirectory) {
		return noIdentity(dir, role)
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, release()) }()
	base, err := o.oneIdentity(dir, role)
	if err != nil {
		return err
	}
	if err := Confirm(o.streams, yes, "set aside the identity in %s: this %s enrols anew, with a new join code", base, role); err != nil {
		return err
	}
	to := filepath.Join(base, setAside+time.Now().UTC().Format("20060102T150405Z"))
	kept, err := move(dir, base, to)
	if err != nil {
		return fmt.Errorf("set the identity aside in %s: %w", to, err)
	}
	t := Table{Columns: []string{"role", "set_aside"}}
	t.Add(string(role), to)
	if err := o.out.Print(map[string]any{"role": role, "set_aside": to}, t); err != nil {
		return err
	}
	code := "sallyport join create --name NAME --replace"
	if role == wire.RoleRCP {
		code = "sallyport rcp join NAME --replace"
	}
	o.out.Note("Put a new join code (`%s` on the gateway) where the %s looks for it, and start it.", code, role)
	if kept {
		o.out.Note("The old one, the code that `sallyport local join` kept, is set aside too.")
	}
	o.out.Note("%s holds the old private key: delete it when the %s is enrolled.", to, role)
	return nil
}

func noIdentity(dir string, role wire.Role) error {
	return Fail(ExitNotFound, "there is no identity in %s: a join code is all that this %s needs", dir, role)
}

// oneIdentity is the directory that holds the directory of the identity: of the
// only one, or of the one that --trust-domain names.
func (o *offline) oneIdentity(dir string, role wire.Role) (string, error) {
	pattern := filepath.Join(dir, "identity")
	switch {
	case role == wire.RoleNode && o.trustDomain != "":
		if !wire.ValidTrustDomain(o.trustDomain) {
			return "", Usage("--trust-domain: %q is no name of a trust domain", wire.Quotable(o.trustDomain))
		}
		pattern = filepath.Join(dir, o.trustDomain, "identity")
	case role == wire.RoleNode:
		pattern = filepath.Join(dir, "*", "identity")
	}
	found, err := filepath.Glob(pattern)
	switch {
	case err != nil:
		return "", err
	case len(found) == 0:
		return "", noIdentity(dir, role)
	case len(found) > 1:
		return "", Usage("this node serves %d gateways: say which with --trust-domain", len(found))
	}
	return filepath.Dir(found[0]), nil
}

// move moves what makes the party to a directory of its own that nobody else
// reads: the identity last, so that a second run finishes what was interrupted.
func move(dir, base, to string) (kept bool, err error) {
	if err := os.Mkdir(to, 0o700); err != nil {
		return false, err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(to) // while nothing is in it
		}
	}()
	if kept, err = moveKept(dir, base, to); err != nil {
		return kept, fmt.Errorf("the code that `sallyport local join` kept: %w", err)
	}
	for _, name := range []string{"uid", "identity"} {
		err := os.Rename(filepath.Join(base, name), filepath.Join(to, name))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return kept, err
		}
	}
	for _, name := range []string{to, base} {
		if err := atomicfile.SyncDir(name); err != nil {
			return kept, err
		}
	}
	return kept, nil
}

// moveKept moves the join code that `local join` kept for this identity: the
// role, started with a new one, would go on asking the old gateway by it, which
// is not wanted where it moves to another.
func moveKept(dir, base, to string) (bool, error) {
	kept := filepath.Join(dir, identity.KeptJoin)
	b, err := os.ReadFile(kept)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if code, err := wire.ParseJoinCode(string(b)); err == nil && base != dir && code.TrustDomain != filepath.Base(base) {
		return false, nil // it is for another gateway that this node serves
	}
	if err := os.Rename(kept, filepath.Join(to, identity.KeptJoin)); err != nil {
		return false, err
	}
	return true, atomicfile.SyncDir(dir)
}
