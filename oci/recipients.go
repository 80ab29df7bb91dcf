package oci

import (
	"fmt"
	"slices"
	"strings"
)

// NoRecipients, alone in a list, says that a checkpoint image is not to be encrypted
// though the container came from an encrypted one.
const NoRecipients = "none"

// RecipientForms are ocicrypt's. The first three read a file.
const RecipientForms = "jwe:PUBLIC-KEY-FILE, pkcs7:CERTIFICATE-FILE, pkcs11:FILE, pgp:NAME-OR-ADDRESS, provider:NAME"

// CheckRecipients refuses what names no recipient of an encrypted layer. Whether the
// keys are there shows when they are used.
func CheckRecipients(list []string) error {
	for _, one := range list {
		if one == NoRecipients {
			if len(list) > 1 {
				return fmt.Errorf("recipient %s goes with no other", NoRecipients)
			}
			continue
		}
		scheme, value, _ := strings.Cut(one, ":")
		if !slices.Contains([]string{"jwe", "pkcs7", "pkcs11", "pgp", "provider"}, scheme) || strings.TrimSpace(value) == "" {
			return fmt.Errorf("recipient %.200q is none; possible: %s", one, RecipientForms)
		}
	}
	return nil
}

// ParseRecipients reads a list of recipients, separated by commas.
func ParseRecipients(text string) ([]string, error) {
	var list []string
	for one := range strings.SplitSeq(text, ",") {
		list = append(list, strings.TrimSpace(one))
	}
	return list, CheckRecipients(list)
}
