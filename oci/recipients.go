package oci

import (
	"fmt"
	"path"
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

// NamesFile tells whether a recipient is a file's, and which.
func NamesFile(recipient string) (scheme, file string, ok bool) {
	scheme, file, _ = strings.Cut(recipient, ":")
	return scheme, file, slices.Contains([]string{"jwe", "pkcs7", "pkcs11"}, scheme)
}

// ParseRecipients reads an option: recipients, separated by commas. Who writes it is in no
// directory, so names of files must be absolute.
func ParseRecipients(text string) ([]string, error) {
	var list []string
	for one := range strings.SplitSeq(text, ",") {
		list = append(list, strings.TrimSpace(one))
	}
	if err := CheckRecipients(list); err != nil {
		return nil, err
	}
	for _, one := range list {
		if _, file, ok := NamesFile(one); ok && !path.IsAbs(file) {
			return nil, fmt.Errorf("recipient %.200q: give the file by its absolute path", one)
		}
	}
	return list, nil
}
