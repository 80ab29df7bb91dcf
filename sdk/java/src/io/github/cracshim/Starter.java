package io.github.cracshim;

import java.time.zone.ZoneRules;
import java.time.zone.ZoneRulesProvider;
import java.util.NavigableMap;
import java.util.ResourceBundle;
import java.util.Set;
import java.util.TreeMap;
import java.util.spi.ResourceBundleControlProvider;

/**
 * Makes a JVM take part whose program knows nothing of checkpoints.
 *
 * <p>The JDK instantiates all service providers of some kinds that are on its class path when a
 * program first uses what they could extend: resource bundles, or time zones. Programs of some size,
 * Tomcat for one, do that while they start. These two provide nothing, so nothing else changes; and
 * there is no other way in that costs as little: an agent forbids archives of classes.
 */
public final class Starter implements ResourceBundleControlProvider {
    /** For the JDK. */
    public Starter() {
        Participant.startInBackground();
    }

    /**
     * Controls no bundle.
     *
     * @param baseName any
     * @return null
     */
    @Override
    public ResourceBundle.Control getControl(String baseName) {
        return null;
    }

    /** Has rules for no time zone. */
    public static final class Zones extends ZoneRulesProvider {
        /** For the JDK. */
        public Zones() {
            Participant.startInBackground();
        }

        @Override
        protected Set<String> provideZoneIds() {
            return Set.of();
        }

        @Override
        protected ZoneRules provideRules(String zoneId, boolean forCaching) {
            throw new java.time.zone.ZoneRulesException("Unknown time-zone ID: " + zoneId);
        }

        @Override
        protected NavigableMap<String, ZoneRules> provideVersions(String zoneId) {
            return new TreeMap<>();
        }
    }
}
