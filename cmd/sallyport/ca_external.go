package main

import (
	"github.com/spf13/cobra"

	"sallyport/config"
	"sallyport/internal/cli"
	"sallyport/pki"
)

// caPassphraseCommand works on the files of this host: whoever may read and
// write them needs nobody's leave.
func (a *app) caPassphraseCommand() *cobra.Command {
	var none bool
	cmd := &cobra.Command{
		Use: "passphrase NEW-FILE", Short: "Change the passphrase of the CA's keys on this host", Args: cli.Between(0, 1),
		Long: "Encrypt the CA's keys in $SALLYPORT_DATA/pki under the passphrase in NEW-FILE. SALLYPORT_PKI_PASSPHRASE_FILE\n" +
			"names the file with the one in force. The process that holds the CA must not run. Copies of the keys in\n" +
			"backups keep the passphrase that they have.",
		RunE: func(cmd *cobra.Command, args []string) error {
			if none == (len(args) == 1) {
				return cli.Usage("name the file with the new passphrase, or say --none")
			}
			c, err := config.LoadPKI(a.streams.Env)
			if err != nil {
				return err
			}
			old, err := c.Passphrase()
			if err != nil {
				return err
			}
			var next []byte
			if !none {
				s, err := config.ReadPassphrase("NEW-FILE", args[0])
				if err != nil {
					return err
				}
				next = []byte(s.Reveal())
			}
			var current []byte
			if old != "" {
				current = []byte(old.Reveal())
			}
			if err := pki.Reseal(c.Dir("pki"), current, next); err != nil {
				return err
			}
			if none {
				a.out.Note("The keys lie open in %s now. Start without SALLYPORT_PKI_PASSPHRASE_FILE, or they are encrypted again.", c.Dir("pki"))
				return nil
			}
			a.out.Note("Set SALLYPORT_PKI_PASSPHRASE_FILE=%s before the next start.", args[0])
			return nil
		},
	}
	cmd.Flags().BoolVar(&none, "none", false, "leave the keys unencrypted")
	return cmd
}
