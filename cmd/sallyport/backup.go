package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"strconv"
	"strings"
	"sync"

	"github.com/spf13/cobra"

	"sallyport/config"
	"sallyport/gateway/backup"
	"sallyport/gateway/store"
	"sallyport/internal/cli"
	"sallyport/internal/sealed"
	"sallyport/pki"
)

const passphraseVariable = "SALLYPORT_BACKUP_PASSPHRASE_FILE"

func gatewayPlace(c config.Gateway) backup.Place {
	return backup.Place{Gateway: c.Dir("gateway"), PKI: c.Dir("pki"), Database: c.Database}
}

// watched shows a bar from the first byte on, after the passphrase was asked for,
// until done.
func (a *app) watched(p backup.Place, label string) (_ backup.Place, done func()) {
	bar := &cli.Progress{}
	var begin sync.Once
	p.Watch = func(done, total int64) {
		begin.Do(func() { bar = cli.NewProgressBytes(a.streams, label) })
		bar.SetBytes(done, total)
	}
	return p, func() { bar.Done() }
}

// onThisHost names the user of a command that works on the gateway's files, for
// the audit log.
func onThisHost(ctx context.Context) context.Context {
	who := fmt.Sprintf("uid %d", os.Geteuid())
	if u, err := user.LookupId(strconv.Itoa(os.Geteuid())); err == nil {
		who = u.Username
	}
	return store.WithActor(ctx, store.Actor{Who: who, Origin: "command line"})
}

func (a *app) backupCommand() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use: "backup FILE", Short: "Write all that makes the gateway into a new encrypted file, on the gateway's host", Args: cli.Exactly(1),
		Long: "Write the gateway's database, the certificate authority in $SALLYPORT_DATA/pki, the gateway's identity and its\n" +
			"API certificate into a new file, encrypted under a passphrase. The gateway may run meanwhile. Who has the file\n" +
			"and the passphrase has the installation: keep them in different places.",
		RunE: func(cmd *cobra.Command, args []string) error {
			if args[0] == "-" { // who reads a pipe cannot tell half a backup from a whole one
				return cli.Usage("backup -: name a new file; it is there when it is whole, and can be copied from there")
			}
			c, err := config.LoadGateway(a.streams.Env)
			if err != nil {
				return err
			}
			if file == "" {
				file = c.BackupPass
			}
			passphrase, err := cli.Passphrase(a.streams, file, passphraseVariable, true)
			if err != nil {
				return err
			}
			place, done := a.watched(gatewayPlace(c), "backup")
			m, err := backup.Create(onThisHost(cmd.Context()), place, args[0], cli.BuildVersion(), passphrase)
			done()
			if taken := (*fs.PathError)(nil); errors.As(err, &taken) && taken.Path == args[0] && errors.Is(err, fs.ErrExist) {
				return cli.Fail(cli.ExitRefused, "%s is there already: name a new file", args[0])
			}
			if err != nil {
				return err
			}
			if a.out.Format != cli.FormatTable {
				return a.out.Print(m, cli.Table{Columns: []string{"created", "installation", "generation", "authority"},
					Rows: [][]string{{cli.Time(m.Created), m.Installation, fmt.Sprint(m.Generation), fmt.Sprint(m.Authority)}}})
			}
			a.out.Note("%s holds installation %s, generation %d, encrypted under the passphrase.", args[0], m.Installation, m.Generation)
			if !m.Authority {
				a.out.Note("It holds no certificate authority: there is none in %s. Back it up where it is.", c.Dir("pki"))
			} else if p, err := config.LoadPKI(a.streams.Env); err == nil && p.Signer != "" {
				a.out.Note("It holds no keys that the signer at %s keeps: copy the signer's directory too.", p.Signer)
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&file, "passphrase-file", "", "file whose one line is the passphrase (default $"+passphraseVariable+", else a person is asked)")
	return cmd
}

func (a *app) restoreCommand() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use: "restore FILE", Short: "Put a backup in the place of the gateway, as a new generation", Args: cli.Exactly(1),
		Long: "Put a backup in the place of what is in $SALLYPORT_DATA, on the same host or on a new one. The gateway must not\n" +
			"run. Nodes and RCPs need nothing: they have seen newer revisions than the backup knows, and a new generation\n" +
			"stands above all of them. Join codes that were not used yet are void. A gateway that still runs from the older\n" +
			"state stops itself when an RCP shows it the new generation. What was there is kept beside it.\n" +
			"A database alone, such as the one that a restoration kept, is restored alone.",
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := config.LoadGateway(a.streams.Env)
			if err != nil {
				return err
			}
			if file == "" {
				file = c.BackupPass
			}
			place, done := a.watched(gatewayPlace(c), "restore")
			r, err := backup.Restore(cmd.Context(), place, args[0], func() ([]byte, error) {
				return cli.Passphrase(a.streams, file, passphraseVariable, false)
			})
			done()
			switch {
			case errors.Is(err, sealed.ErrOpen):
				return cli.Fail(cli.ExitRefused, "restore %s: %w; nothing was changed", args[0], err)
			case err != nil:
				return fmt.Errorf("restore %s: %w", args[0], err)
			}
			return a.sayRestored(c, r)
		},
	}
	cmd.Flags().StringVar(&file, "passphrase-file", "", "file whose one line is the passphrase (default $"+passphraseVariable+", else a person is asked)")
	return cmd
}

func (a *app) sayRestored(c config.Gateway, r backup.Restored) error {
	if a.out.Format != cli.FormatTable {
		return a.out.Print(r, cli.Table{Columns: []string{"database", "previous", "installation", "generation", "authority", "identity"},
			Rows: [][]string{{r.Database, r.Previous, r.Installation, fmt.Sprint(r.Generation), fmt.Sprint(r.Authority), fmt.Sprint(r.Identity)}}})
	}
	a.out.Say("%s is restored: installation %s, generation %d. Start the gateway now.", r.Database, r.Installation, r.Generation)
	if !r.Authority {
		a.sayAuthority(c)
	}
	if r.Previous != "" {
		a.out.Say("The database before is kept as %s.", r.Previous)
		if r.Authority || r.Identity {
			a.out.Say("So are the CA and the identity before, in directories %s: remove them when all is well, they hold keys.", strings.TrimPrefix(r.Previous, r.Database+"."))
		}
	}
	return nil
}

// sayAuthority says which certificate authority a gateway goes on with whose backup
// holds none.
func (a *app) sayAuthority(c config.Gateway) {
	const none = "The backup holds no certificate authority"
	here, err := pki.Exists(c.Dir("pki"))
	switch {
	case c.PKI != "":
		a.out.Say(none+": the one at %s is used as it is.", c.PKI)
	case here || err != nil: // that of another user
		a.out.Say(none+": the one in %s is used as it is.", c.Dir("pki"))
	default:
		a.out.Say(none+", and there is none in %s: set SALLYPORT_GATEWAY_PKI as it was before, or put that directory back first.", c.Dir("pki"))
	}
}
